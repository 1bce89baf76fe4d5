"""Images: where they are stored, how they are decoded, and how they are cropped."""

# Mean and standard deviation of ImageNet's pixels, per channel, in units of 0..1. They normalise images by default.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What each depth of a pixel is divided by before mean and std: integers are shares of their range, floats are as they
# are stored.
DEPTHS = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
STRETCHES = ("none", "percentile", "asinh")

Size = tuple[int, int]  # height, width


def size_of(crop: int | Size) -> Size:
    """Height and width of a crop that is given by them, or by the side of a square."""
    return (crop, crop) if isinstance(crop, int) else (int(crop[0]), int(crop[1]))


def crop_of(size: Size) -> int | Size:
    """The side of a square, another size as it is."""
    return size[0] if size[0] == size[1] else size
