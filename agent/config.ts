import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'

/** agent.json of the recovery site's appliance. */
export const AgentConfig = Type.Object(
  {
    /** Journals, mirrors, catalogue, keys. */
    stateDirectory: Type.String({ default: '/var/lib/pve-cdp/agent' }),
    runDirectory: Type.String({ default: '/run/pve-cdp' }),
    apiSocket: Type.String({ default: '/run/pve-cdp/agent.sock' }),
    /** Where recovery points are served. */
    pointSocket: Type.String({ default: '/run/pve-cdp/points.sock' }),
    listen: Type.Object({ host: Type.String({ default: '0.0.0.0' }), port: Type.Integer({ default: 8765, minimum: 0, maximum: 65_535 }) }, { default: {}, additionalProperties: false }),
    /** A segment is closed at this size or count of records. */
    segmentBytes: Type.Integer({ default: 64 * 1024 * 1024, minimum: 1024 * 1024 }),
    segmentRecords: Type.Integer({ default: 262_144, minimum: 1024 }),
    /** Memory of all open recovery points together, for pages of the index and for decoded frames. */
    pageCacheBytes: Type.Integer({ default: 64 * 1024 * 1024, minimum: 1024 * 1024 }),
    frameCacheBytes: Type.Integer({ default: 64 * 1024 * 1024, minimum: 1024 * 1024 }),
    log: Type.Object(
      { level: Type.Union([Type.Literal('error'), Type.Literal('warn'), Type.Literal('info'), Type.Literal('debug'), Type.Literal('trace')], { default: 'info' }), format: Type.Union([Type.Literal('json'), Type.Literal('human')], { default: 'human' }) },
      { default: {}, additionalProperties: false },
    ),
  },
  { additionalProperties: false },
)
export type AgentConfig = Static<typeof AgentConfig>
