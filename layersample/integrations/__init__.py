"""Front doors to other libraries' training loops."""
