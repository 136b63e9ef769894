"""From a recipe to a plan: everything that is decided without touching a weight."""
