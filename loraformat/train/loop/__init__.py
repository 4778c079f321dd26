"""Steps, optimizer, checkpoints: whatever the model is."""
