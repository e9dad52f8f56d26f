"""What a person sees of a training while it runs, and what MLflow is told of the machine."""

import psutil
import torch

from jobs.system import MEGABYTE, system_metrics
from jobs.train import note

LINE = {"total": 1.234, "separation_db": -3.21, "audio_seconds_per_s": 199.6}


def test_the_line_fits_beside_a_bar() -> None:
    said = note(LINE | {"data_wait_share": 0.012, "step_s": 0.4})
    assert said == "loss 1.23, sep. -3.2 dB, 200 audio-s/s, wait 1%"


def test_the_line_of_a_validation_is_what_it_found() -> None:
    both = {"valid_eer": 0.1234, "valid_si_snr_improvement_db": 4.56}
    assert note(both) == "valid EER 12.3%, separation +4.6 dB"
    assert note({"valid_eer": 0.1234}) == "valid EER 12.3%"


def test_the_machine_is_told_as_it_is() -> None:
    found = system_metrics(torch.device("cpu"))
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    whole = psutil.virtual_memory().total / MEGABYTE
    own = found["system/process_memory_megabytes"]
    assert 10 < own < whole
    assert 10 < found["system/system_memory_usage_megabytes"] < whole
