"""Images: where they lie, how they are decoded and cropped."""

# Of each channel, for pixels in [0, 1]. Training subtracts the one and divides by the other.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
