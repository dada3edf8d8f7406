"""The paper: gate, embeddings, local training, scores."""
