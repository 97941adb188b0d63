"""The Axolotl host: the only room that imports axolotl."""
