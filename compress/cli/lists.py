"""What there is to choose from: methods, families, recipes, the keys of a recipe."""

from __future__ import annotations

import json

from compress.system.tables import print_table


def print_methods(as_json: bool) -> None:
    """Print the names of all methods, those of installed packages too; imports none of them."""
    from compress.methods.catalog import METHODS

    rows = [(name, METHODS.origin(name), METHODS.summary(name)) for name in METHODS]
    if as_json:
        print(json.dumps([{"name": n, "from": f, "summary": s} for n, f, s in rows]))
        return
    print_table("methods (options: compress methods NAME)", ["name", "from", "what it does"], rows)


def print_method(name: str, as_json: bool) -> None:
    """Print one method's options from its schema."""
    from compress.methods.catalog import METHODS
    from compress.planning.reference import keys_of_method

    cls = METHODS.get(name)
    options = keys_of_method(name)
    if as_json:
        about = {
            "name": cls.name, "summary": cls.summary, "from": METHODS.origin(name),
            "source": cls.source, "needs": cls.needs, "writes": sorted(cls.writes),
        }  # fmt: skip
        print(json.dumps({**about, "options": [key._asdict() for key in options]}))
        return
    print(f"{cls.name}: {cls.summary}")
    print(f"from     {METHODS.origin(name)}")
    print(f"source   {cls.source}")
    print(f"needs {cls.needs}")
    print(f"writes   {', '.join(sorted(cls.writes))}")
    print_table("options", ["option", "type", "default", "meaning"], options)


def print_families(as_json: bool) -> None:
    """Print the model families that have an entry; others are inferred."""
    from compress.models.families import FAMILIES

    if as_json:
        print(json.dumps(sorted(FAMILIES)))
        return
    print(", ".join(sorted(FAMILIES)))
    print("Other types work where their blocks can be inferred: try `compress inspect MODEL`.")


def print_recipes(as_json: bool) -> None:
    """Print the shipped recipes."""
    import yaml

    from compress.planning.recipe_files import shipped_recipes

    rows = []
    for name, path in shipped_recipes().items():
        data = yaml.safe_load(path.read_text())
        model = data["model"]
        if isinstance(model, dict):
            model = model.get("source", "trained by the recipe")
        steps = [step["method"] for step in data.get("steps", [])]
        rows.append((name, model, steps, str(path)))
    if as_json:
        named = ("name", "model", "steps", "file")
        print(json.dumps([dict(zip(named, row, strict=True)) for row in rows]))
        return
    print_table(
        "recipes (compress run NAME)", ["name", "model", "steps"],
        [(name, model, ", ".join(steps)) for name, model, steps, _ in rows],
    )  # fmt: skip


def print_keys(as_json: bool) -> None:
    """Print every key of a recipe, as docs/recipes.md has them."""
    from compress.planning import reference

    if not as_json:
        print(reference.markdown())
        return
    parts = {"sections": reference.sections(), "steps": reference.steps()}
    print(json.dumps({
        part: {place: [key._asdict() for key in keys] for place, keys in found.items()}
        for part, found in parts.items()
    }))  # fmt: skip
