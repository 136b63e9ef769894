"""Models that a recipe trains itself: its section ``model.train``, and what carries it out."""
