"""Write the JSON Schema that editors use on recipe files: `python -m tagi_ray.recipes`."""

import json

from tagi_ray.recipes.resolve import FOLDER, json_schema

if __name__ == "__main__":
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    (FOLDER / "schema.json").write_text(text, encoding="utf-8")
