"""Where people already are: each module here plugs the layer into one other library, which it alone imports."""
