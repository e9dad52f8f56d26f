"""The CSC model: contrastive separative coding, reconstructed (arXiv 2103.00816).

Knows tensors only: nothing here reads audio files, talks to Ray or to MLflow.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csc_model.model import CSC

__all__ = ["CSC"]


def __getattr__(name: str) -> Any:
    """Import the model on first use: configuration alone must not cost the import of torch."""
    if name == "CSC":
        from csc_model.model import CSC

        return CSC
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
