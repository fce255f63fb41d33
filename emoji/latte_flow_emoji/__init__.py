"""The checkpoint `emoji`: where this distribution is installed, `latte-flow` knows it by name."""
