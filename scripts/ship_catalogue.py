"""Build the catalogue of timm's architectures and put it where the package ships it from: `make catalogue`."""

from attnlens.cli.console import tracked
from attnlens.models.catalogue import build_catalogue, ship_catalogue

if __name__ == "__main__":
    catalogue = build_catalogue(tracked("architectures"))
    path = ship_catalogue(catalogue)
    print(f"{path}: {len(catalogue.entries)} architectures, {path.stat().st_size} bytes; not built: {catalogue.failed}")
