"""The federation on its devices, its rounds, and what they record."""
