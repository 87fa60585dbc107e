// The protected site's side of pairing: takes an operator's token, gets a client certificate, keeps it.
//
// main.ts loads the pairing at its start (loadPairing) and hands its TLS identity to the capture workers; the API's "pair" calls
// joinSite. A site is paired with one agent site at a time; a new pairing replaces the old one whole, in one rename.
//
// The agent's authority is verified against the fingerprint in the token before anything is said: a man in the middle learns
// nothing. The private key is made here and never leaves.
//
// This folder never streams, never keeps a token, never connects by itself.
export { joinSite } from './join.ts'
export type { JoinOptions } from './join.ts'
export { loadPairing, removePairing } from './pairing-file.ts'
export type { Pairing } from './pairing-file.ts'
