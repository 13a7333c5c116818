"""What can be said of an exported checkpoint from its folder alone: rules, by kind in one file each."""
