"""How the model in the package was made: data, augmentation, losses, schedule. Not part of the installed package."""
