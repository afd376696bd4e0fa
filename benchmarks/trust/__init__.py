"""What attnlens promises about hostile files, faults and scale, counted: each part fills its entry of trust.json."""
