// The agent's side of pairing: one-time tokens, the answer to a site that shows one, and the register of paired sites.
//
// main.ts creates one PairingDesk from the site's authority; the API asks it for tokens, core/link hands it connections (onPair)
// and asks its register whether a genuine certificate is still the current one (admit). Tokens are known only by the hash of their
// secret, valid 15 minutes unless said otherwise, good for one pairing, void after ten wrong tries of anybody.
//
// This folder never listens, never streams, never trusts a name that a site gives itself beyond what the token's bearer may do:
// a site that is paired again replaces itself, and its former certificate is refused from then on.
export { createPairingDesk } from './desk.ts'
export type { PairingDesk, PairingDeskOptions } from './desk.ts'
export type { PairedSite, PairedSites } from './sites.ts'
