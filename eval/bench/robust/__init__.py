"""Right on every machine: what eval/results/robust.json holds, a module a part."""
