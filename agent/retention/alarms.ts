import type { EventLog } from '../../core/api/index.ts'

/** Something that an operator should know as long as it lasts. Ids are stable; with `vm` one for each VM. */
export type AlarmId =
  | 'retention.damaged'
  | 'retention.failed'
  | 'retention.hard-stop'
  | 'retention.history-short'
  | 'retention.journal-large'
  | 'retention.no-room'
  | 'retention.over-limit'
  | 'retention.pinned'
  | 'retention.reserve'
  | 'retention.sync-paused'
export type Alarm = { id: AlarmId; level: 'warn' | 'error'; message: string; vm?: string }
export type RaisedAlarm = Alarm & { sinceUnixMs: number }

/** The alarms of one group: those raised, and since when. What begins and what ends becomes an event, once. */
export class AlarmBoard {
  readonly #vpg: string
  readonly #events: EventLog
  readonly #nowUnixMs: () => number
  #raised = new Map<string, RaisedAlarm>()

  constructor(vpg: string, events: EventLog, nowUnixMs: () => number) {
    this.#vpg = vpg
    this.#events = events
    this.#nowUnixMs = nowUnixMs
  }

  list(): RaisedAlarm[] {
    return [...this.#raised.values()]
  }

  /** These hold now, and no others. */
  show(alarms: readonly Alarm[]): void {
    const next = new Map<string, RaisedAlarm>()
    for (const alarm of alarms) {
      const key = `${alarm.id} ${alarm.vm ?? ''}`
      const before = this.#raised.get(key)
      next.set(key, { ...alarm, sinceUnixMs: before?.sinceUnixMs ?? this.#nowUnixMs() })
      if (before?.level !== alarm.level) this.#tell(alarm.level, alarm, alarm.message)
    }
    for (const [key, alarm] of this.#raised) if (!next.has(key)) this.#tell('info', alarm, `over: ${alarm.message}`)
    this.#raised = next
  }

  #tell(level: 'info' | 'warn' | 'error', { id, vm }: Alarm, message: string): void {
    this.#events.append({ level, kind: id, message: `VPG ${this.#vpg}: ${message}`, context: { vpg: this.#vpg, ...(vm === undefined ? {} : { vm }) } })
  }
}
