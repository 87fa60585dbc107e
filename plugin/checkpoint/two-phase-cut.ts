/** How a cut ended. `retry`: nothing is wrong, somebody was only too slow or busy with another cut. */
export type CutOutcome = { ok: true } | { ok: false; why: string; retry?: boolean }

/**
 * A group cut over several nodes, seen by its coordinator (semantics.md, "Group cut over nodes, two phases").
 * holding: acknowledgements are to be held everywhere. committing: all hold, the marker is to be inserted everywhere.
 */
export type TwoPhaseCut =
  | { is: 'holding'; vmIds: readonly number[]; nodes: readonly string[]; waiting: readonly string[]; held: readonly number[] }
  | { is: 'committing'; nodes: readonly string[]; waiting: readonly string[]; refusals: readonly string[] }
  | { is: 'ended'; outcome: CutOutcome }

export type TwoPhaseEvent =
  /** A node holds the acknowledgements of these members. */
  | { on: 'held'; node: string; vmIds: readonly number[] }
  /** A node has inserted its markers. */
  | { on: 'committed'; node: string }
  /** A node said no to what is asked now, or cannot be asked. */
  | { on: 'refused'; node: string; why: string; retry?: boolean }
  /** The time for the present phase is over. */
  | { on: 'late' }

export type TwoPhaseEffect = { do: 'hold' | 'commit' | 'release'; node: string }

export type TwoPhaseStep = { state: TwoPhaseCut; effects: TwoPhaseEffect[] }

const all = (what: TwoPhaseEffect['do'], nodes: readonly string[]): TwoPhaseEffect[] => nodes.map((node) => ({ do: what, node }))

/** @param nodes those that run members; @param vmIds all members of the group: the cut needs every one of them, exactly once */
export const beginTwoPhaseCut = (nodes: readonly string[], vmIds: readonly number[]): TwoPhaseStep =>
  ({ state: { is: 'holding', vmIds, nodes, waiting: nodes, held: [] }, effects: all('hold', nodes) })

const abandon = (nodes: readonly string[], why: string, retry: boolean): TwoPhaseStep => ({ state: { is: 'ended', outcome: { ok: false, why, retry } }, effects: all('release', nodes) })

/**
 * One step. Pure. Whatever is lost, late or doubled: COMMIT is asked for only after every member was held, so a checkpoint whose marker
 * stands in every journal is a consistent one; any other never becomes valid.
 */
export const nextTwoPhaseCut = (state: TwoPhaseCut, event: TwoPhaseEvent): TwoPhaseStep => {
  const stay: TwoPhaseStep = { state, effects: [] }
  switch (state.is) {
    case 'ended':
      // A hold that is granted after the end would only run out by itself.
      return event.on === 'held' ? { state, effects: all('release', [event.node]) } : stay
    case 'holding': {
      if (event.on === 'late') return abandon(state.nodes, `the hold ran out while waiting for ${state.waiting.join(', ')}`, true)
      if (!state.waiting.includes(event.node)) return stay
      if (event.on === 'refused') return abandon(state.nodes, `${event.node}: ${event.why}`, event.retry === true)
      if (event.on === 'committed') return stay
      const waiting = state.waiting.filter((node) => node !== event.node)
      const held = [...state.held, ...event.vmIds]
      if (waiting.length > 0) return { state: { ...state, waiting, held }, effects: [] }
      const missing = state.vmIds.filter((vmId) => !held.includes(vmId))
      if (missing.length > 0) return abandon(state.nodes, `VM ${missing.join(', ')} is held by no node`, false)
      if (held.length !== state.vmIds.length) return abandon(state.nodes, 'a VM is held by two nodes', false)
      return { state: { is: 'committing', nodes: state.nodes, waiting: state.nodes, refusals: [] }, effects: all('commit', state.nodes) }
    }
    case 'committing': {
      if (event.on === 'late') {
        const why = [...state.refusals, `no answer to the commit from ${state.waiting.join(', ')}`].join('; ')
        return { state: { is: 'ended', outcome: { ok: false, why, retry: false } }, effects: all('release', state.waiting) }
      }
      if (event.on === 'held' || !state.waiting.includes(event.node)) return stay
      const waiting = state.waiting.filter((node) => node !== event.node)
      const refusals = event.on === 'refused' ? [...state.refusals, `${event.node}: ${event.why}`] : state.refusals
      if (waiting.length > 0) return { state: { ...state, waiting, refusals }, effects: [] }
      if (refusals.length === 0) return { state: { is: 'ended', outcome: { ok: true } }, effects: [] }
      return { state: { is: 'ended', outcome: { ok: false, why: refusals.join('; '), retry: true } }, effects: [] }
    }
  }
}
