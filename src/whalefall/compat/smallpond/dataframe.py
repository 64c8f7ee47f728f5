"""smallpond.dataframe: Session and DataFrame, and with them all data sets and nodes."""

from whalefall.compat.smallpond.logical.dataset import *  # noqa: F403
from whalefall.compat.smallpond.logical.node import *  # noqa: F403
from whalefall.data.frame import DataFrame as DataFrame
from whalefall.data.session import Session as Session
