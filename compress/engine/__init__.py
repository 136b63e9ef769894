"""Runs and live models: steps executed, journalled, resumed and taken back."""
