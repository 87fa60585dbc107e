/** Who is hit. */
export const COMPONENTS = ['plugin', 'worker', 'agent', 'QEMU', 'link'] as const
/** By what. A thread knows no signals: a worker that is "killed" ends itself, one that is "stopped" turns for ever. */
export const FAULTS = ['SIGKILL', 'SIGSTOP', 'restart', 'disk full', 'slow disk', 'cut', 'slow', 'lossy'] as const
/** While what goes on. */
export const PHASES = ['initial', 'streaming', 'spill', 'bitmap sync', 'delta sync', 'promotion', 'point open'] as const

export type Component = (typeof COMPONENTS)[number]
export type Fault = (typeof FAULTS)[number]
export type Phase = (typeof PHASES)[number]
export type Cell = { component: Component; fault: Fault; phase: Phase }

export const nameOf = ({ component, fault, phase }: Cell): string => `${component} / ${fault} / ${phase}`

/** Why a cell would show nothing; undefined: it is part of the matrix. */
export const whyLeftOut = ({ component, fault, phase }: Cell): string | undefined => {
  const isOfLink = fault === 'cut' || fault === 'slow' || fault === 'lossy'
  if (isOfLink !== (component === 'link')) return 'only a line is cut, slow or lossy, and nothing else happens to one'
  if (component === 'link' && fault === 'cut' && phase === 'spill') return 'it is cut already'
  if (component === 'worker' && fault === 'restart') return 'nobody restarts a thread in peace'
  if (fault !== 'disk full' && fault !== 'slow disk') return undefined
  if (component === 'QEMU') return "what the guest's own disk makes it wait is not ours"
  if (component === 'worker') return 'its files are those of the plugin'
  if (component === 'plugin' && phase !== 'spill') return 'it writes to its disk when memory overflows, and only then'
  return undefined
}

export const ALL_CELLS: readonly Cell[] = PHASES.flatMap((phase) => COMPONENTS.flatMap((component) => FAULTS.map((fault): Cell => ({ component, fault, phase }))))
  .filter((cell) => whyLeftOut(cell) === undefined)

/** A few cells that between them meet most components and kinds of fault; the rest of the short form's ground is covered by the e2e tests. */
export const SHORT_CELLS: readonly Cell[] = [
  { component: 'link', fault: 'lossy', phase: 'streaming' },
  { component: 'plugin', fault: 'disk full', phase: 'spill' },
  { component: 'worker', fault: 'SIGKILL', phase: 'delta sync' },
]

/** What a cell needs of its rig: those with the same needs share one. */
export type RigKind = {
  slowDisks: boolean
  promotes: boolean
  /** With the watchdog: where it is what ends the fault. Elsewhere it would end a plugin that only waits for its turn on a busy machine. */
  watched: boolean
}
export const kindOf = ({ component, fault, phase }: Cell): RigKind => ({ slowDisks: fault === 'slow disk', promotes: phase === 'promotion', watched: component === 'plugin' && fault === 'SIGSTOP' })

/** Cells in an order in which rigs are seldom changed: first copies in front, since they begin with nothing. `jitter` from 0 to 1 is what chance decides. */
export const rankOf = (cell: Cell, jitter: number): number => {
  const { slowDisks, promotes, watched } = kindOf(cell)
  return (promotes ? 8 : 0) + (slowDisks ? 4 : 0) + (watched ? 2 : 0) + (cell.phase === 'initial' ? 0 : 1) + Math.min(jitter, 0.999)
}

/** The matrix as text: what `show` makes of each cell, "-" for those left out. */
export const tableOf = (show: (cell: Cell) => string): string => {
  const rows = COMPONENTS.flatMap((component) => FAULTS.map((fault) => [`${component} / ${fault}`, ...PHASES.map((phase) => (whyLeftOut({ component, fault, phase }) === undefined ? show({ component, fault, phase }) : '-'))]))
  const table = [['', ...PHASES], ...rows]
  const widths = table[0].map((_, at) => Math.max(...table.map((row) => row[at].length)))
  return table.map((row) => row.map((text, at) => text.padEnd(widths[at])).join('  ').trimEnd()).join('\n')
}
