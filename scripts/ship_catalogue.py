"""Build the catalogue of timm's architectures and put it where the package ships it from: `make catalogue`."""

from attnlens.catalogue import build_catalogue, ship_catalogue
from attnlens.cli.console import tracked

if __name__ == "__main__":
    catalogue = build_catalogue(tracked("architectures"))
    path = ship_catalogue(catalogue)
    print(f"{path}: {len(catalogue.entries)} architectures, {path.stat().st_size} bytes; not built: {catalogue.failed}")
