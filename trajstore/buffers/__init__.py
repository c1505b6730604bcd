"""Drop-in faces of other projects' buffers: ``rlinf``, ``objectrl``, ``apexrl``. No storage code lives here."""
