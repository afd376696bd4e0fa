"""Build what the package ships of timm's architectures, and put it where it ships it from: `make catalogue`.

The catalogue, one line an architecture, and the descriptions of all layers, so that no first run needs timm.
"""

import json

from attnlens.cli.console import tracked
from attnlens.models.catalogue import build_catalogue, ship_catalogue
from attnlens.models.described import ship_layouts
from attnlens.models.open import EMBEDDED

if __name__ == "__main__":
    catalogue = build_catalogue(tracked("architectures"))
    path = ship_catalogue(catalogue)
    print(f"{path}: {len(catalogue.entries)} architectures, {path.stat().st_size} bytes; not built: {catalogue.failed}")
    embedded = json.loads((EMBEDDED / "config.json").read_text())
    known = [(entry.name, {}) for entry in catalogue.entries]
    path = ship_layouts(tracked("layouts")([*known, (embedded["architecture"], embedded["model_args"])]))
    print(f"{path}: {path.stat().st_size} bytes")
