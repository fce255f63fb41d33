"""The checkpoint `emoji` of latte-flow, in the folder `emoji`."""
