"""From a name, a folder, a file or a module to an opened model: which layers it has and how each is laid out."""
