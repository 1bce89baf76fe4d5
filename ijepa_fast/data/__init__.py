"""Images: where they are stored, how they are decoded, and how they are cropped."""

# Mean and standard deviation of ImageNet's pixels, per channel, in units of 0..1. They normalise images by default.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
