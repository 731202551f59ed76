"""What a step holds between forward and backward, made smaller."""
