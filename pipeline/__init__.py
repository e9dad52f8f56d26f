"""The data side of CSC: corpora in, utterance store, mixture shards, batches out."""
