"""The networks a comparison trains, one file each; `registry` finds them."""
