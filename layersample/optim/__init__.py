"""What an optimizer works on, and what becomes of its state while layers are frozen."""
