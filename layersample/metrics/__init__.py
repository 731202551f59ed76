"""What a layer's weights say of it: heavy tails, outliers and the norms of a LoRA adapter."""
