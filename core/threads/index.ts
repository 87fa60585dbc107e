// What worker threads of both daemons share. Called by a worker about itself; it decides nothing about what the worker does.
export { yieldToOthers } from './yield-to-others.ts'
