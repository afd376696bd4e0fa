"""Build what the package ships of timm's architectures, and put it where it ships it from: `make catalogue`.

The catalogue, one line an architecture, and the descriptions of all layers: the first run needs no timm then.
"""

from attnlens.cli.console import tracked
from attnlens.models.catalogue import build_catalogue, ship_catalogue
from attnlens.models.described import ship_layouts

if __name__ == "__main__":
    catalogue = build_catalogue(tracked("architectures"))
    path = ship_catalogue(catalogue)
    print(f"{path}: {len(catalogue.entries)} architectures, {path.stat().st_size} bytes; not built: {catalogue.failed}")
    path = ship_layouts(tracked("layouts")(sorted(entry.name for entry in catalogue.entries)))
    print(f"{path}: {path.stat().st_size} bytes")
