"""Text, tokens and masks: what a run reads, described and digested so that it can be repeated."""
