"""What a sampler is, and what samplers share."""
