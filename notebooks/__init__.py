"""The notebooks, and what runs them."""
