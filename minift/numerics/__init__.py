"""How one number is stored."""
