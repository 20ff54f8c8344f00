"""Files that a network ships as: written, read back, checked, and described."""

from slimfront.trainables.shipping.formats import FORMATS, Format, load, save
from slimfront.trainables.shipping.shipment import Shipment, ship
from slimfront.trainables.shipping.shipped import Shipped

__all__ = ["FORMATS", "Format", "Shipment", "Shipped", "load", "save", "ship"]
