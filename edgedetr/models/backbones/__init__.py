"""Networks that turn an image into feature maps."""
