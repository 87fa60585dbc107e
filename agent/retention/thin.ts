export type ThinEntry = { id: string; atUnixMs: number; isTagged: boolean; isSuspect: boolean; /** The oldest recoverable one, or the one that history is moving to. */ isHeld: boolean }

/**
 * Which of these may go, if one in each stretch of `everyMs` stays: the oldest that is not suspect. Stretches are counted from 1970 by the
 * checkpoints' own labels, so the answer does not depend on when, how often, or on which part of the list it is asked; and the one that
 * stays for an hour is one that stayed for its minute, so finer levels may run before or not.
 * @param entries all valid checkpoints of whole stretches, oldest first (the last stretch may go on behind)
 */
export const thinOut = (entries: readonly ThinEntry[], everyMs: number): ThinEntry[] => {
  const gone: ThinEntry[] = []
  let stretch: number | undefined
  let kept = false
  for (const entry of entries) {
    const its = Math.floor(entry.atUnixMs / everyMs)
    if (its !== stretch) {
      stretch = its
      kept = false
    }
    const stays = !kept && !entry.isSuspect
    if (stays) kept = true
    else if (!entry.isTagged && !entry.isHeld) gone.push(entry)
  }
  return gone
}

export const stretchStart = (atUnixMs: number, everyMs: number): number => Math.floor(atUnixMs / everyMs) * everyMs
