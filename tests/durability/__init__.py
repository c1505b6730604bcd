"""Nothing acknowledged is lost: kills, power cuts, races, failing storages."""
