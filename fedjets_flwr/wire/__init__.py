"""How models and messages travel; the only part of this package that knows Flower."""
