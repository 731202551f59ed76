"""`layersample train`: model, data and sampler in, a trained model out, by TRL's SFTTrainer."""
