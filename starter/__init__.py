"""The starter bundle: images to train it on, its training, and what it is compared with."""
