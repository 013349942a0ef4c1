"""The mathematics: properties every algorithm has, numbers each must give."""
