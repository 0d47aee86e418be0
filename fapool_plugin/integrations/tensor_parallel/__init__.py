"""A Hugging Face model of which each base rank holds a part."""
