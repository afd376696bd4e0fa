"""The attention classes of timm: a file a kind of layout, each a table of rules from module class to slots."""
